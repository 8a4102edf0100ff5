"""mini-Wan: a small trained text-to-video WanPipeline, and how it was trained."""
