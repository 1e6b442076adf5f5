"""Models: loaded, sampled from, saved, and students made from them."""
