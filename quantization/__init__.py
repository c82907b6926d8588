"""How a tensor becomes smaller: recipes and schemes."""
