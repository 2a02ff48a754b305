from unet_denoiser.cli import main

main()
