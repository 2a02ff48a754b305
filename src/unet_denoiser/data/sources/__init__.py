"""Sources of images: folders, tables, arrays, datasets of Python."""
