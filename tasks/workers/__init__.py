"""More processes than one: the ranks of a stage that trains, Dask's workers for the corpus."""
