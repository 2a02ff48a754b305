from unet_denoiser.cli import main

if __name__ == "__main__":  # not in data-loading workers, which import this module again
    main()
