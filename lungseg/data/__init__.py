"""From scans to training patches in object storage, and back as a stream."""
