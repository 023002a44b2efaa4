envoy_peer envoy-waypoint-rbac-noop2 10042 hbone
