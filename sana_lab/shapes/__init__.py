"""The embedded world of coloured shapes: scenes, data, detector, extractor, CLIP score."""
