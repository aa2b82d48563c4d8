"""Files that are copied into exported folders; they run without Midstream and import none of it."""
