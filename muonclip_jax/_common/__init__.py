"""Helpers that every package uses.

Types, checks of settings, paths in pytrees, text tables, and arrays placed like others.
"""
