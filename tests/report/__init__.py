"""Reports, pages, pictures."""
