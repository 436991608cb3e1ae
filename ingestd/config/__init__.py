"""Machinery of settings, which knows no component: layers, keys, units, sections."""
