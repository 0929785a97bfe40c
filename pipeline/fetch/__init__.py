"""The bytes behind an address that a list gives, under limits. Knows no rows and no units."""
