"""One module per data source; `base` states their contract."""
