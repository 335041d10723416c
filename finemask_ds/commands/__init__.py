"""Commands of `finemask`, a module each."""
