"""The workshop of the demo model: from freely licensed text to the checkpoint that ships inside the package."""
