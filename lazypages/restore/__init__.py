"""Bringing tasks back without CRIU: images in, a plan for the program ``uffd_restorer`` out."""
