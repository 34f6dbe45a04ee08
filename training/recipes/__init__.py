"""Shipped recipes: `lceval train NAME`."""
