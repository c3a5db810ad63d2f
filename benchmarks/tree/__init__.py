"""Priority tree compared with its peers."""
