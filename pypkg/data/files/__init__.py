"""The one way this package writes files, and imports of optional packages."""
