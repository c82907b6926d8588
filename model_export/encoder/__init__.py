"""The vision encoder as a Core ML package: channel-first graph, range-safe float16, compression."""
