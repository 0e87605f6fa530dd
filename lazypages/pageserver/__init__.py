"""A page server like `criu page-server`: receives the images of a dump, or serves the pages of images."""
