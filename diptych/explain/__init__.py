"""What a model looked at: attention maps as a page (`maps`, `page`), and which heads matter (`importance`)."""
