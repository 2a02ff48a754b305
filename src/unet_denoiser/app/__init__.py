"""The page: samples, edits, trainings and reports in a browser; only `unet-denoiser app` imports gradio."""
