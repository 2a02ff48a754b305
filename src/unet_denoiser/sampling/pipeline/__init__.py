"""Names and files in, pictures out."""
