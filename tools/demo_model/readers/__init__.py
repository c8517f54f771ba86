"""Readers: one module per kind of source package, each a function from an unpacked package to documents by split."""
