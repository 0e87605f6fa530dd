"""Sources of pages: local images and page servers."""
