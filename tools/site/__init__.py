"""What the site (`make docs`, mkdocs.yml) needs beyond MkDocs' own plugins."""
