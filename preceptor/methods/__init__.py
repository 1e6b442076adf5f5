"""The methods: a folder each, with the recipe, its own pieces and its reproduction."""
