"""What exists: recipes, presets, platforms. Typed, validated, merged; knows no engine."""
