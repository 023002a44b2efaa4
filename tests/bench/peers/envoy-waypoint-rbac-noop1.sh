envoy_peer envoy-waypoint-rbac-noop1 10041 hbone
