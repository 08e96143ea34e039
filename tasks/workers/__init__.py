"""Work in several processes: the ranks of a training stage, Dask's workers for the corpus."""
