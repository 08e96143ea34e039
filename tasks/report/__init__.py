"""Stage `report`: one page about the whole pipeline."""
