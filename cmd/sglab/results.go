// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"scattergather.io/scattergather/internal/lab"
	"scattergather.io/scattergather/internal/lab/report"
)

// writeResults writes result.json and report.html into a directory.
func writeResults(dir string, result *lab.Result) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	page, err := report.HTML(result, time.Now())
	if err != nil {
		return err
	}
	files := map[string][]byte{"result.json": result.JSON(), "report.html": page}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return fmt.Errorf("writing the results: %w", err)
		}
	}
	fmt.Printf("Timeline: %s, numbers: %s\n", filepath.Join(dir, "report.html"), filepath.Join(dir, "result.json"))
	return nil
}
