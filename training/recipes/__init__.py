"""Recipes that come with the package: `lceval train NAME`."""
