"""Research: how well each method fuses, measured on the miniature or on pairs of your own.

It uses klora; klora never uses it.
"""
