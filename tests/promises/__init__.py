"""What minituner promises, one file each, every one an equality. If you doubt the tool, read these first."""
