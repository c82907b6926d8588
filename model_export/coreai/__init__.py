"""The Core AI bundle for macOS 27 and iOS 27: its programs, their conversion, its contract, Apple's runtime."""
