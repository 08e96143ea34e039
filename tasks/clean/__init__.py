"""Stage `clean`: from outside files to the documents worth learning from, each rejected one kept with its rule."""
