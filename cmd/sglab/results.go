// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"scattergather.io/scattergather/internal/lab"
)

// writeResults writes result.json and report.html into a directory.
func writeResults(dir string, result *lab.Result) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	err := os.WriteFile(filepath.Join(dir, "result.json"), result.JSON(), 0o644)
	if err := errors.Join(err); err != nil {
		return fmt.Errorf("writing the results: %w", err)
	}
	fmt.Printf("Details: %s\n", filepath.Join(dir, "result.json"))
	return nil
}
