"""A module a system: its row and its section of docs/paper.md, with pictures, from its histories."""
