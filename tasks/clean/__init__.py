"""Stage `clean`: from external files to the documents worth learning from; rejected ones are kept with their rule."""
