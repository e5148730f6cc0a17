"""Research: how well each method fuses, measured on the miniature or on pairs of your own. Uses klora; klora never uses this."""
