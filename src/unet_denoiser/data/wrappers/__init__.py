"""What is put around a data set."""
