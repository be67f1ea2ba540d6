"""A run as one web page: what was measured, tables and pictures, in a file that needs no network."""

from spectralquant.evaluation.page.page import PAGE, write_page

__all__ = ["PAGE", "write_page"]
