"""Machinery of settings, which knows no component: sources, keys, units, sections, reload."""
