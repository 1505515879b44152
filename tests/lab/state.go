// The state directory: where the datastores lie as plain files.
package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// stateMarker lists, a line each, what labs have made in a directory.
const stateMarker = ".hyper2kvm-lab"

// stateDir is a temporary directory, removed at the end, or a given one, which is left as it is. What an earlier lab
// left in a given one is removed at the start, and nothing else is touched.
type stateDir struct {
	path    string
	ours    bool
	claimed map[string]bool
}

func openState(given string) (*stateDir, error) {
	s := &stateDir{claimed: map[string]bool{}}
	var err error
	if given == "" {
		s.ours = true
		s.path, err = os.MkdirTemp("", "hyper2kvm-lab-")
		return s, err
	}
	if s.path, err = filepath.Abs(given); err != nil {
		return nil, err
	}
	if err = os.MkdirAll(s.path, 0o755); err != nil {
		return nil, err
	}
	return s, s.removeEarlier()
}

func (s *stateDir) removeEarlier() error {
	marker := filepath.Join(s.path, stateMarker)
	f, err := os.Open(marker)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if name := lines.Text(); name == filepath.Base(name) && name != ".." && strings.Trim(name, ".") != "" {
			if err = os.RemoveAll(filepath.Join(s.path, name)); err != nil {
				return err
			}
		}
	}
	return os.Remove(marker)
}

// claim is the path of a new entry, "" where this lab has one of that name, an error where somebody else has.
func (s *stateDir) claim(name string) (string, error) {
	if s.claimed[name] {
		return "", nil
	}
	dir := filepath.Join(s.path, name)
	if _, err := os.Stat(dir); err == nil {
		return "", fmt.Errorf("%s is there already, and not from an earlier lab", dir)
	}
	s.claimed[name] = true
	f, err := os.OpenFile(filepath.Join(s.path, stateMarker), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, name)
	return dir, err
}

func (s *stateDir) close() {
	if s.ours {
		os.RemoveAll(s.path)
	}
}
