//! Block graph, request path, drivers and jobs of stord.
