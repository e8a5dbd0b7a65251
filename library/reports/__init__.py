"""What a person looks at: pages, plots, grids of pictures."""
