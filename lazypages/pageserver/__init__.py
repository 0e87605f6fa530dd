"""A page server as `criu page-server`: it receives the images of a dump, or serves the pages of images."""
