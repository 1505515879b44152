// What `/folder` makes of a GET of several ranges where `POST /faults` says so; without that it answers them all.
package main

import (
	"net/http"
	"strings"
)

var severalRanges = []string{"first", "whole", "refused", "broken", "joined"}

// onSeveralRanges is the status that such a request is refused with, 0 where it is not; it may leave less of it.
func (f *faults) onSeveralRanges(r *http.Request) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	ranges := strings.Split(r.Header.Get("Range"), ",")
	if len(ranges) == 1 {
		return 0
	}
	switch f.several {
	case "first":
		r.Header.Set("Range", ranges[0])
	case "whole":
		r.Header.Del("Range")
	case "refused":
		return http.StatusRequestedRangeNotSatisfiable
	case "broken":
		return http.StatusInternalServerError
	case "joined":
		first, _, _ := strings.Cut(ranges[0], "-")
		_, last, _ := strings.Cut(ranges[1], "-")
		r.Header.Set("Range", strings.Join(append([]string{first + "-" + last}, ranges[2:]...), ","))
	}
	return 0
}
