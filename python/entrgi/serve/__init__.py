"""``entrgi serve``: an OpenAI-compatible server of guided texts, with a page that shows what guidance does."""
