"""Recipes: experiments as plans of runs."""
